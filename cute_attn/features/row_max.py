"""Each row's largest score, for QK-clip (arXiv:2507.20534): an output."""

from .feature import Feature


class RowMaxFeature(Feature):
    """The value is True; and where a call allocates, the float32 tensor that is written, of lse's shape.

    It has no gradient, and hinders none.
    """

    name, keywords, part = "row_max", ("return_row_max", "return_max_logit"), "row_max"
    schema, defaults = ("bool return_row_max=False",), dict(return_row_max=False, return_max_logit=False)
    differentiable = True

    def given(self, asked):
        return True if asked.get("return_row_max") or asked.get("return_max_logit") else None

    def arguments(self, value):
        return (value,)

    def reference(self, value, how):
        """The reference is asked for it in any case."""

    def by_name(self, value):
        return dict(return_row_max=True)

    def operator_arguments(self, value):
        return (value is not None,)
