"""Explainers: evidence of one latent → explanation.

An explainer is one class in one file that carries `@explainer("name")`; built-ins register through the same door as plugins.
"""

from exegete.tools.explainers.contract import (
    Explainer,
    Explanation,
    NotExplained,
    explainer,
    explainer_names,
    make_explainer,
)

__all__ = ["Explainer", "Explanation", "NotExplained", "explainer", "explainer_names", "make_explainer"]
