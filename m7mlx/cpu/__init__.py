"""Linux's CPU backend, made fast: nothing else imports it, and no other system needs it."""
