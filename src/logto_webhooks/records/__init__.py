"""Records of users, organizations and memberships, merged in any order. No I/O."""
