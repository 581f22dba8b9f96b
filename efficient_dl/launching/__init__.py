"""Where a process stands among its peers, whoever started it; and descriptions of jobs for those who start them."""
