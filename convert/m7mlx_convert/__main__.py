from m7mlx_convert.cli import main

raise SystemExit(main())
