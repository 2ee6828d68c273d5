from m7mlx_start import run_command


def main() -> int:
    """Entry point; returns the exit status."""
    return run_command("m7mlx_convert.cli")


if __name__ == "__main__":
    raise SystemExit(main())
