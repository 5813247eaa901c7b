"""The report: one self-contained HTML file of what a run folder contains."""
