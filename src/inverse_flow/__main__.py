"""``python -m inverse_flow``, which is also what ``torchrun -m`` starts."""

from inverse_flow.command.main import main

main()
