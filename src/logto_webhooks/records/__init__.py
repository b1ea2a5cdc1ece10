"""Records of users, organizations and memberships, merged without needing order. No I/O."""
