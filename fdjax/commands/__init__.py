"""The commands of `fdjax`, one file each: arguments, messages, and one call."""
