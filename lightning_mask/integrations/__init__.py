"""The same masks in other people's trainers; each module imports the library that it is for."""
