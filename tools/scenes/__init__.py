"""The data set of the mini bundle: captioned synthetic pictures, and their judge."""
