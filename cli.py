"""The command line: one command per verb. Parse, call one library function of the same name, save, print."""
