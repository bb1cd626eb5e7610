"""What a part of a kernel is: one variation of rows, blocks, softmax, weights, outputs and so on, in a file of its own.

`parts.parts_of` chooses them by the config, and the roles (producer, mainloop, epilogue) call them. A part holds Python
values only; what it needs at run time comes as `problem.args`, by the name of its field in `state.Arguments`.
"""

from typing import Any


class Part:
    def __init__(self, config: Any):
        self.config = config
