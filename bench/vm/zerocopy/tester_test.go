package main

import (
	"errors"
	"fmt"
	"testing"
)

// A run is only repeated when nothing but plain connections is wrong with it, and
// the programs say that they let SYNs pass: without hosts nobody does.
func TestStarved(t *testing.T) {
	plain := &notEncrypted{2, "2 connections are plain"}
	for _, err := range []error{
		plain,
		errors.New("other bytes than were sent"),
		errors.Join(plain, errors.New("other bytes than were sent")),
		fmt.Errorf("with all packets on queue 3: %w", plain),
	} {
		if starved(err, nil) {
			t.Errorf("repeated after: %v", err)
		}
	}
	if !starved(errors.Join(errors.Join(&notEncrypted{}), &notEncrypted{}), nil) {
		t.Error("not repeated, though as many SYNs passed as connections were plain")
	}
}
