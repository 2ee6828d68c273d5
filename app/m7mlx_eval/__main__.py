import sys

from m7mlx_eval.cli import main

sys.exit(main())
