"""The stories: what each command does, from the request to the finished file."""
