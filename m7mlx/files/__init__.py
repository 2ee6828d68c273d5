"""Files: on this disk, on the Hub, checked before they are used."""
