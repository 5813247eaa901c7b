"""Studies of the methods themselves: does a super-net rank architectures right?"""
