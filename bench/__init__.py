"""The measurements behind docs/specification.md: ratios within one run, beside the alternative."""
