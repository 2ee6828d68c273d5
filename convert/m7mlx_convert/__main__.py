def main() -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C at any moment."""
    try:
        from m7mlx_start import run_command  # inside, so that Ctrl-C is heard meanwhile

        return run_command("m7mlx_convert.cli")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
