import sys

from m7mlx_bench.cli import main

sys.exit(main())
