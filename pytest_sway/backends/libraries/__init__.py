"""Other people's code: kept quiet while it runs, and its errors traced to the file and field at fault."""
