"""``python -m sentence_vipyloqwen``: the command line, as ``accelerate launch -m`` and ``torchrun -m`` start it."""

from sentence_vipyloqwen.cli import main

if __name__ == "__main__":
    main()
