"""Every text that is sent to a language model: one Jinja2 file each, rendered strictly, identified by its digest.

The first line of a file is a comment that says what it asks. Each top-level block is one message; its name begins with
the role (`system`, `user`, `assistant`). Only the last block, `user`, has values; all before it are the same in every
request, so that providers can cache them. `exegete.tools.prompting` renders.
"""
