from m7mlx_chat.cli import main

raise SystemExit(main())
