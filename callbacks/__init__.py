"""Lightning callbacks of the litropy recipes."""
