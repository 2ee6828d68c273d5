from m7mlx_server.cli import main

raise SystemExit(main())
