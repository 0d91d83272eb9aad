"""The folder that one would send: the packed program, its log, and the checks of any such folder."""
