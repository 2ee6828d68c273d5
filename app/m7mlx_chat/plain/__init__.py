"""The chat in lines: for screen readers, logs, and terminals that cannot place the cursor.

Answers go to standard output, whatever else is said to standard error; nothing that has been
written is written over. What can be done is what `m7mlx_chat.actions` lists under a slash.

reading        messages, typed or piped
writing        answers, notes and progress
models         which model answers
conversations  begun, listed, opened; what is done to one of them
commands       what else stands after a slash
talk           a question and its answer; from the start to the end
"""
