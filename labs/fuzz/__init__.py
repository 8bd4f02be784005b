"""What strangers may hand us, damaged on purpose: configurations, hostfiles, payloads.

Every case must end in a value or in one of our own errors. All of it follows from a seed.
"""
