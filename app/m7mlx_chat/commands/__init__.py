"""What the user can do, one module for each group of actions; `app.ChatApp` is made of all groups.

asking         send a message, answer again, edit a question; stop an answer, leave
tools          allow calls of tools, show them, list tools
full           go on where a conversation has no more room
compare        see versions beside each other, ask another model, too
versions       go through the versions of a message, fork a conversation
unsent_text    write in $EDITOR, bring back what was asked before
prompts        use a prompt of one's own, keep one
conversations  open, search, rename, pin, tag, put away, delete and bring back
models         choose and load a model
settings       settings, presets, the system prompt, the theme
copying        copy a message, its code, the conversation
files          export and import
background     the terminal's title and bell, for who looks elsewhere
titles         have the model write a title when nothing is asked for
looking        help, figures, the rolling buffer; select and scroll

A group is a class on `view.ChatView` with its own few attributes. `actions.ACTIONS` lists all
actions; the method of the action `name` is `action_<name>`.
"""
