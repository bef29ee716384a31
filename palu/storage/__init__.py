"""Files and folders: written aside and renamed; hashed; read as JSON."""
