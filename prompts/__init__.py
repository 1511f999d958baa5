"""Every text that is sent to a language model: one Jinja2 file each, rendered strictly, identified by its digest.

Nothing here calls a language model so far, so there are none.
"""
