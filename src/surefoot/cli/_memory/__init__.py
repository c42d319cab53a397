"""What `surefoot memory` prints and draws."""
