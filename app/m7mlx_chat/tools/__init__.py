"""Tools of other programs, by the Model Context Protocol (extra `tools`).

start       whether there are tools at all
toolbox     `Toolbox`: what the session knows of tools, and the thread that speaks with the servers
offers      a server's tools as a model is told of them, with names that are their own
connection  one server: started, asked what it has, called, and given up when it does not answer
client      what is said to it, by the SDK
transport   the bytes between, within bounds; line: what became of them
results     what a tool gave, as text within bounds
allowed     what the command line allows
approvals   what the user has said of a tool, bound to what the tool is
check*      whether arguments fit a tool's schema, in a process of its own

Whatever a server says is a stranger's: text for the model and the screen, never a command.
"""
