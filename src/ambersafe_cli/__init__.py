"""Safety-tune a language model with DPO: patch and launch eric-mitchell/direct-preference-optimization."""

__version__ = "0.1.0"
