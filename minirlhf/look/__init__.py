"""What one looks with: the ledger of every tensor, the microscope's page, pictures of runs."""
