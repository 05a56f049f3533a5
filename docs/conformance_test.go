// Package docs_test holds the documents to the code that they speak of.
package docs_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// conformance.md is one table of counts, and one of rows for each section:
//
//	| section | requirements | permissions |
//	| id | level | requirement | how | tests |
//
// The id is ENO-4.5-2 for the second requirement of section 4.5 of RFC 8547,
// in the order of its text, and ENO-4.5-m1 for a permission that is used.
var (
	countRow = regexp.MustCompile(`^\| (ENO|TC) (\d[\d.]*) \| (\d+) \| (\d+) \|$`)
	rowID    = regexp.MustCompile(`^(ENO|TC)-(\d[\d.]*)-(m?)(\d+)$`)
	testList = regexp.MustCompile("^`[^`]+`(, `[^`]+`)*$")
	testRef  = regexp.MustCompile(`^([a-z0-9/]+)\.((?:Test|Fuzz)\w+)(?:/(.+))?$`)
	goFile   = regexp.MustCompile(`\b[a-z0-9/_]+\.(?:go|c|toml|md|service)\b`)

	identifier = regexp.MustCompile(`\w+`)
	// `name` in file.go: the place named must hold the name.
	place = regexp.MustCompile("((?:`[\\w.]+`(?:, | and )?)+) (?:in|of) ([a-z0-9/_]+\\.(?:go|c))")

	requirementLevels = []string{"MUST", "MUST NOT", "REQUIRED", "SHALL", "SHALL NOT", "SHOULD", "SHOULD NOT", "RECOMMENDED", "NOT RECOMMENDED"}
	permissionLevels  = []string{"MAY", "OPTIONAL"}
)

// module is what the rows can name: the tests of each package, and the string
// literals of the file that each stands in, which are the names of subtests.
type module struct {
	root  string
	tests map[string]map[string]bool // "slowpath.TestResume" -> literals
}

func readModule(t *testing.T, root string) *module {
	t.Helper()
	m := &module{root: root, tests: make(map[string]map[string]bool)}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root:
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if err == nil || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") {
				return filepath.SkipDir
			}
			return nil
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		rel, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		return m.readFile(path, filepath.ToSlash(rel))
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *module) readFile(path, pkg string) error {
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	literals := make(map[string]bool)
	ast.Inspect(f, func(n ast.Node) bool {
		if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
			if s, err := strconv.Unquote(l.Value); err == nil {
				literals[s] = true
			}
		}
		return true
	})
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
			m.tests[pkg+"."+fn.Name.Name] = literals
		}
	}
	return nil
}

// missing returns why a reference names no test, or "".
func (m *module) missing(ref string) string {
	p := testRef.FindStringSubmatch(ref)
	if p == nil {
		return "is no reference to a test"
	}
	pkg, name, sub := p[1], p[2], p[3]
	literals, ok := m.tests[pkg+"."+name]
	switch {
	case !ok:
		return "names no test"
	case sub == "" || literals[sub]:
		return ""
	}
	// A script, or a name that is put together of two parts.
	if _, err := os.Stat(filepath.Join(m.root, pkg, "testdata", "script", sub+".txtar")); err == nil {
		return ""
	}
	for i := range sub {
		if literals[sub[:i]] && literals[sub[i:]] {
			return ""
		}
	}
	return "names no subtest"
}

// check returns what is wrong with the document.
func (m *module) check(doc string) (problems []string) {
	say := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	want, got := make(map[string][2]int), make(map[string][2]int)
	heading := ""
	for i, line := range strings.Split(doc, "\n") {
		if p := countRow.FindStringSubmatch(line); p != nil {
			r, _ := strconv.Atoi(p[3])
			s, _ := strconv.Atoi(p[4])
			want[p[1]+" "+p[2]] = [2]int{r, s}
			continue
		}
		if h, ok := strings.CutPrefix(line, "### "); ok {
			heading = h
		}
		if !strings.HasPrefix(line, "| ENO-") && !strings.HasPrefix(line, "| TC-") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if len(cells) != 5 {
			say("line %d: %d cells, want 5", i+1, len(cells))
			continue
		}
		p := rowID.FindStringSubmatch(cells[0])
		if p == nil {
			say("line %d: id %q", i+1, cells[0])
			continue
		}
		section := p[1] + " " + p[2]
		n, kind, levels := got[section], 0, requirementLevels
		if p[3] == "m" {
			kind, levels = 1, permissionLevels
		}
		n[kind]++
		got[section] = n
		if strconv.Itoa(n[kind]) != p[4] {
			say("%s: out of order, it is number %d of its section", cells[0], n[kind])
		}
		if heading != section && !strings.HasPrefix(heading, section+" ") {
			say("%s: under the heading %q", cells[0], heading)
		}
		if !slices.Contains(levels, cells[1]) {
			say("%s: level %q", cells[0], cells[1])
		}
		for _, problem := range m.checkCells(cells[2], cells[3], cells[4]) {
			say("%s: %s", cells[0], problem)
		}
	}
	for section, n := range want {
		if got[section] != n {
			say("section %s: %d requirements and %d permissions, the count says %d and %d", section, got[section][0], got[section][1], n[0], n[1])
		}
	}
	for section := range got {
		if _, ok := want[section]; !ok {
			say("section %s is not counted", section)
		}
	}
	return problems
}

func (m *module) checkCells(requirement, how, tests string) (problems []string) {
	if requirement == "" || how == "" {
		problems = append(problems, "an empty cell")
	}
	for _, file := range goFile.FindAllString(how, -1) {
		if _, err := os.Stat(filepath.Join(m.root, file)); err != nil {
			problems = append(problems, "no file "+file)
		}
	}
	for _, p := range place.FindAllStringSubmatch(how, -1) {
		text, _ := os.ReadFile(filepath.Join(m.root, p[2]))
		for _, name := range identifier.FindAllString(p[1], -1) {
			if !regexp.MustCompile(`\b` + name + `\b`).Match(text) {
				problems = append(problems, fmt.Sprintf("no %s in %s", name, p[2]))
			}
		}
	}
	if why, ok := strings.CutPrefix(tests, "n/a: "); ok {
		if why == "" {
			problems = append(problems, "n/a without a reason")
		}
		return problems
	}
	if !testList.MatchString(tests) {
		return append(problems, fmt.Sprintf("%q is no list of tests", tests))
	}
	for ref := range strings.SplitSeq(strings.Trim(tests, "`"), "`, `") {
		if why := m.missing(ref); why != "" {
			problems = append(problems, ref+" "+why)
		}
	}
	return problems
}

// Every requirement of both RFCs has its row, and every row its tests.
func TestConformance(t *testing.T) {
	doc, err := os.ReadFile("conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	m := readModule(t, "..")
	for _, p := range m.check(string(doc)) {
		t.Error(p)
	}
	// As many as the RFCs have outside of their boilerplate.
	rows := map[string]int{}
	for line := range strings.Lines(string(doc)) {
		if c := countRow.FindStringSubmatch(strings.TrimSpace(line)); c != nil {
			n, _ := strconv.Atoi(c[3])
			rows[c[1]] += n
		}
	}
	if rows["ENO"] != 91 || rows["TC"] != 89 {
		t.Errorf("%d requirements of RFC 8547 and %d of RFC 8548, there are 91 and 89", rows["ENO"], rows["TC"])
	}
}

// The check finds what is wrong.
func TestCheck(t *testing.T) {
	m := readModule(t, "..")
	const head = "| ENO 9.9 | 1 | 0 |\n### ENO 9.9 Title\n"
	row := func(cells ...string) string { return "| " + strings.Join(cells, " | ") + " |\n" }
	const here, sub = "`docs.TestCheck`", "`docs.TestCheck/good row`"
	for _, x := range []struct {
		name, doc, want string
	}{
		{"good row", head + row("ENO-9.9-1", "MUST", "r", "docs/conformance.md", here+", "+sub), ""},
		{"not applicable", head + row("ENO-9.9-1", "SHOULD NOT", "r", "h", "n/a: applications"), ""},
		{"put together", head + row("ENO-9.9-1", "MUST", "r", "h", "`docs.TestCheck/good rowput together`"), ""},
		{"permission", "| ENO 9.9 | 0 | 1 |\n### ENO 9.9\n" + row("ENO-9.9-m1", "MAY", "r", "h", here), ""},
		{"pending", head + row("ENO-9.9-1", "MUST", "r", "h", "pending: something"), "no list"},
		{"partly pending", head + row("ENO-9.9-1", "MUST", "r", "h", here+", pending: something"), "no list"},
		{"no name", head + row("ENO-9.9-1", "MUST", "r", "h", "`docs.check`"), "is no reference"},
		{"no test", head + row("ENO-9.9-1", "MUST", "r", "h", "`docs.TestNowhere`"), "names no test"},
		{"no package", head + row("ENO-9.9-1", "MUST", "r", "h", "`nowhere.TestCheck`"), "names no test"},
		{"no subtest", head + row("ENO-9.9-1", "MUST", "r", "h", "`docs.TestCheck/"+strings.Repeat("x", 9)+"`"), "names no subtest"},
		{"second of two", head + row("ENO-9.9-1", "MUST", "r", "h", here+", `docs.TestNowhere`"), "names no test"},
		{"nothing", head + row("ENO-9.9-1", "MUST", "r", "h", ""), "cells"},
		{"no file", head + row("ENO-9.9-1", "MUST", "r", "docs/nowhere.go", here), "no file"},
		{"place", head + row("ENO-9.9-1", "MUST", "r", "`check` and `module.readFile` in docs/conformance_test.go", here), ""},
		{"no such place", head + row("ENO-9.9-1", "MUST", "r", "`check` and `nowhere_"+"at_all` in docs/conformance_test.go", here), "no nowhere_"},
		{"no reason", head + row("ENO-9.9-1", "MUST", "r", "h", "n/a: "), "no list"},
		{"a row too few", head, "the count says 1"},
		{"a row too many", head + row("ENO-9.9-1", "MUST", "r", "h", here) + row("ENO-9.9-2", "MUST", "r", "h", here), "the count says 1"},
		{"gap", head + row("ENO-9.9-2", "MUST", "r", "h", here), "out of order"},
		{"level", head + row("ENO-9.9-1", "MAY", "r", "h", here), "level"},
		{"level of a permission", "| ENO 9.9 | 0 | 1 |\n### ENO 9.9\n" + row("ENO-9.9-m1", "MUST", "r", "h", here), "level"},
		{"another heading", "| ENO 9.9 | 1 | 0 |\n### ENO 9\n" + row("ENO-9.9-1", "MUST", "r", "h", here), "heading"},
		{"not counted", "### ENO 9.9\n" + row("ENO-9.9-1", "MUST", "r", "h", here), "not counted"},
	} {
		t.Run(x.name, func(t *testing.T) {
			got := strings.Join(m.check(x.doc), "; ")
			if (x.want == "") != (got == "") || !strings.Contains(got, x.want) {
				t.Errorf("found %q, want %q", got, x.want)
			}
		})
	}
}
