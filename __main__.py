"""`python -m edgecap`: the same commands without the entry point (accelerate launch -m edgecap …)."""

from .cli import main

if __name__ == "__main__":
    main()
