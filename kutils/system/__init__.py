"""Files, tables, devices and ranks, child processes, progress; knows no prompt, model or run."""
