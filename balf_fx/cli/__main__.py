"""`python -m balf_fx.cli`, which torchrun can start."""

from balf_fx.cli.main import main

if __name__ == "__main__":
    main(prog_name="balf-fx")
