"""What people start: labeling runs, the command line, reports. Begin reading at `exegete.agent.run`."""
