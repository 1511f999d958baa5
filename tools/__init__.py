"""The instruments: plain typed functions and classes, usable from Python, the command line and agents alike.

subject, dictionaries, corpus      what is studied, and on which text
activations, merging, evidence     the streaming pass, and what it keeps for each latent
explainers, predicates, rendering  from evidence to words, and to something that can be run
interchange                        evidence from and for elsewhere
store                              where results are kept: one writer, published snapshots
bundled                            the small subject, dictionaries and corpus that ship with the package
"""
