"""What to load, as plain data: the type, the forms in which it is accepted, and what makes two specs one."""
