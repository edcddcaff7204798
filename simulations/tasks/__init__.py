"""Run settings of tasks beside the demo's, and what makes their data."""
