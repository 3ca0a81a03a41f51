"""The command line: one module a command, over the stages and the doctor."""
