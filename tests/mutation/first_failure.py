"""A pytest plugin for broken code: hypothesis stops at its first failure and does not shrink it.

Whether a mutant dies is asked here, not how to show it in few steps.
"""

from hypothesis import Phase, settings

settings.register_profile(
    "first-failure", phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)
settings.load_profile("first-failure")
