"""What several test files share: environments, small runs, the programs' arguments, pretended devices and processes."""
