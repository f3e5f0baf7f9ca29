"""How the schema of the job store came to be what it is, one step a file; `gateway.jobs.database` runs them."""
