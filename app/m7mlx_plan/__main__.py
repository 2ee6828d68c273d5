import sys

from m7mlx_plan.cli import main

sys.exit(main())
