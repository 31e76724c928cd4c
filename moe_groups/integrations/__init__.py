"""Inside of the tools that people train with; each file imports the one it is named after."""
