"""The house itself: what is installed, which storey and room may import which, the build, and what README says."""
