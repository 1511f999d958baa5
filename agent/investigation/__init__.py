"""The investigation: a question about a model's behaviour, answered by experiments with predictions, controls and checks.

contract       the values: question, metric, prediction, outcome, claim, decision; what an investigator is
questions      reading questions and prompts; the split into search and held-out prompts
measuring      a metric as something that instruments can measure; criterion: what a judge says of continuations
toolbelt       functions as tools: schemas, checked calls, compact results
lookups        tools that look something up; experiments: tools that change the model, each with its control
arms           an intervention's effect on the metric, beside random latents
               steering, outputs, holding_up, contrasts: the experiments, with those of `experiments`
ledger         what was predicted, done and found, durable (SQLite)
graph          frame → approve → think → predict → experiment → update → … → verify → report
verifying      claims checked by code on held-out prompts; family: p-values of claims that are judged together
recipe         the investigator without a language model
model          the one with: conversation is what it is told, note_taking what its calls come to
reporting      the report, in Markdown and HTML; gist: what it says first
"""
